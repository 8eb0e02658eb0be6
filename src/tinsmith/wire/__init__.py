"""How it travels: codecs of the Tinker wire, chunking of requests, reduction of metrics."""
