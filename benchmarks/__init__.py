"""The numbers of the README: throughput, races and limits, each with its command."""
