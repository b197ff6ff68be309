"""Head poses in photos, folders and videos: faces, states, drawings."""
