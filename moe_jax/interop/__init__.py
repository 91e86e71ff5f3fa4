"""Other worlds: weights of the original system, faiss, NetworkX. Each import is lazy."""
