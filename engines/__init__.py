"""What can be asked, what comes back, models on disk, and what runs them.

The lowest floor: it knows neither dialects (`compat`) nor the house around them (`gateway`).
"""
