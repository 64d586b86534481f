"""Commands: flags become a request, and what comes back is printed."""
