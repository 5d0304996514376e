"""What the numbers mean: verdict, readings, rules, comparisons. Pure functions of documents."""
