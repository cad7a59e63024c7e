"""Conversations: their fields, the template that makes a prompt of them, tools and their calls.

What the HTTP API and ``InferenceService`` have in common of chat; nothing here knows either.
"""
