"""What `tinsmith doctor` looks at, one module per room. A check finds; it never raises, and changes nothing."""
