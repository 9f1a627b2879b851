"""`uoe report`: a run, or several, as one HTML file to look at."""
