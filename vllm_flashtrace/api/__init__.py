"""What a client sees: the request field, the typed response, and the pictures made of it."""
