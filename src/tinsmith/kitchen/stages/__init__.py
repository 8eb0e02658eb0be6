"""The stages of the workflows that ship."""
