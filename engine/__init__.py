"""Everything that makes pixels and files. No RunPod, no argparse, no environment outside `settings`."""
