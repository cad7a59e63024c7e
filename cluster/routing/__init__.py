"""Choice of a replica and admission: state and functions without Ray, gRPC or I/O.

A router runs these objects, and so does whatever wants to know what it would do.
"""
