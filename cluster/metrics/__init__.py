"""What a router exports to Prometheus, of itself and of the replicas that report to it."""
