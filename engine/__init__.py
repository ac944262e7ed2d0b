"""The parts that the scripts are assembled from."""
