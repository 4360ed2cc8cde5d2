"""This tells what a run will do, and what it did: costs, predictions, reports, measurements, pictures of the way."""
