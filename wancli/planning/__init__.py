"""From settings to a plan: every rule about combinations, checked before anything loads."""
