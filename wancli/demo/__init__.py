"""The embedded demo model: the world it draws, the recipe that trains it, and its evaluation."""
