"""A trained model and a text -> one page that shows how attention works in it."""
