"""Write, read and compare videos, and measure their drift."""
