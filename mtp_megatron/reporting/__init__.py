"""What a run did, as one table, one JSON file and one figure."""
