"""Encrypted inference, engine `fast`: two parties and a dealer, over Z_2^32."""
