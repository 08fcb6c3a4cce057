"""Records -> one HTML page and a model card. Computes nothing but layout."""
