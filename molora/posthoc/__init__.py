"""Routers made after training: how finished LoRAs become a mixture, one file per family of routers."""
