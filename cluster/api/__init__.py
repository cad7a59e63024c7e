"""The HTTP door: OpenAI's API, and what vLLM serves beside it.

An ASGI application over a ``RouterServer`` in the same process: a request goes the same way as one
over gRPC, and not over gRPC. It knows no Ray; ``cluster.actors.router`` has Ray Serve serve it.
"""
