"""What the finance chapter needs: risk measures, the baselines of a trading desk, and orders that cannot wait."""
