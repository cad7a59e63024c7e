"""Fleets that are not here: a discrete-event simulation around the policies that serve.

Whether and how to speculate, budgets, the pool of drafters, the choice of a replica: all of that is
decided by the objects of ``cluster.speculation`` and ``cluster.routing`` themselves. What is
imagined is what they decide about: devices that take their profile's time, guesses that are
accepted as often as was measured, and a network. Free of torch, Ray and gRPC.
"""
