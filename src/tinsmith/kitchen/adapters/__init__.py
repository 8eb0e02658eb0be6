"""What stands on the other side of the ports: servers, embedded engines, fakes."""
