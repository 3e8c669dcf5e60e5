"""API and runners as separate processes: the API serves clients, runners hold the boxes."""
