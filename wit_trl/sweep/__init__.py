"""The search for the weights: trials of pairs and seeds, what they measure, and how sure a difference is."""
