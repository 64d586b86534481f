"""The packaged demo model: its world, the recipe that trains it, and its evaluation."""
