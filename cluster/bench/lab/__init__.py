"""Several hosts on one machine, whose processes and links can be broken; needs root and Linux."""
