"""Pictures and text tables of what routers do."""
