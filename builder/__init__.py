"""Scripts that make what lies in the repository beside the code: generated pages and figures."""
