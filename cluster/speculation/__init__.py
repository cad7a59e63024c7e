"""The laws of speculation: pure functions and small state machines over batched tensors.

No Ray, no gRPC and no I/O; randomness is always an argument. What each file must keep is written
in DESIGN.md under "Rules of speculation".
"""
