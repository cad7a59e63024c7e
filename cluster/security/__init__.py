"""Who may do what: API keys and their limits, certificates, and what was refused. No gRPC, no Ray.

What asks is in ``cluster.rpc`` (gRPC) and ``cluster.api`` (HTTP).
"""
