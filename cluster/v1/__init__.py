"""Generated from protos/cluster/v1 by `make protos`; do not edit."""
