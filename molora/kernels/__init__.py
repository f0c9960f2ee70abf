"""The routed low-rank product: its definition (`dense`), and faster twins that equal it."""
