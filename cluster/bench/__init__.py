"""Measurements that stand behind the project's claims, each a command."""
