"""What computes: one frozen base model, many adapters, training and sampling. Knows no HTTP, no SQL, no dialect."""
