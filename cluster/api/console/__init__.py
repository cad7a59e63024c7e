"""The console: a page that shows the cluster, and a playground. Plain files, nothing to build.

Its JavaScript modules are beside this file: ``console.js`` starts the others, ``api.js`` talks to
the router, ``cluster.js`` and ``charts.js`` show its state, ``playground.js`` and ``tokens.js``
stream answers.
"""
