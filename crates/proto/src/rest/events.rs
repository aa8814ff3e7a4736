//! State changes as clients and channels hear of them.
