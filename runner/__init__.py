"""The command line: runs, sweeps, plans, exports, and several processes of one sweep."""
