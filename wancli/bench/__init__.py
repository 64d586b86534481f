"""`wancli bench`: a baseline against variants of it, in time and in quality."""
