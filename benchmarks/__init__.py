"""The numbers of the README: throughput, races and limits, each measured by child processes."""
