//! What was looked up lately, for a moment: so that a busy client costs a query a second rather than one per request.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How long it is remembered; counted from before the question, so that what another process changes is felt within a
/// second everywhere.
const MOMENT: Duration = Duration::from_millis(900);
/// Most answers that are remembered at once. Beyond it, things are looked up each time.
const MOST: usize = 10_000;

/// Answers by what was asked for.
#[derive(Debug)]
pub(super) struct Lately<K, V> {
    answers: HashMap<K, (V, Instant)>,
    /// Counts what was forgotten: an answer that was asked for before that is not kept.
    forgotten: u64,
}

/// Remembers when a question was asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    at: Instant,
    forgotten: u64,
}

impl<K, V> Default for Lately<K, V> {
    fn default() -> Self {
        Self {
            answers: HashMap::new(),
            forgotten: 0,
        }
    }
}

impl<K: Eq + Hash, V: Clone> Lately<K, V> {
    /// The answer, if it is remembered; else what [`Lately::learn`] needs.
    pub(super) fn recall<Q>(&self, key: &Q, at: Instant) -> Result<V, Asked>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        match self.answers.get(key) {
            Some((answer, since)) if at.saturating_duration_since(*since) < MOMENT => Ok(answer.clone()),
            _ => Err(Asked {
                at,
                forgotten: self.forgotten,
            }),
        }
    }

    /// Remembers an answer, unless something was forgotten meanwhile.
    pub(super) fn learn(&mut self, key: K, answer: V, asked: Asked) {
        if self.forgotten != asked.forgotten {
            return;
        }
        if self.answers.len() >= MOST {
            self.answers
                .retain(|_, (_, since)| asked.at.saturating_duration_since(*since) < MOMENT);
        }
        if self.answers.len() < MOST || self.answers.contains_key(&key) {
            self.answers.insert(key, (answer, asked.at));
        }
    }

    /// Forgets what is no longer so.
    pub(super) fn forget(&mut self, gone: impl Fn(&K, &V) -> bool) {
        self.forgotten += 1;
        self.answers.retain(|key, (answer, _)| !gone(key, answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(answers: &[(&'static str, u32)], at: Instant) -> Lately<&'static str, u32> {
        let mut lately = Lately::default();
        for (key, answer) in answers {
            let asked = lately.recall(key, at).expect_err("unknown");
            lately.learn(*key, *answer, asked);
        }
        lately
    }

    #[test]
    fn an_answer_is_remembered_for_a_moment() {
        let start = Instant::now();
        let lately = learned(&[("a", 1)], start);
        let before = start + MOMENT - Duration::from_millis(1);
        assert_eq!(lately.recall("a", before).ok(), Some(1));
        assert!(lately.recall("a", start + MOMENT).is_err());
        assert!(MOMENT < Duration::from_secs(1));
    }

    #[test]
    fn an_answer_from_before_something_was_forgotten_is_not_kept() {
        let (mut lately, start) = (Lately::default(), Instant::now());
        let asked = lately.recall("a", start).expect_err("unknown");
        lately.forget(|_, _| false);
        lately.learn("a", 1, asked);
        assert!(lately.recall("a", start).is_err());
    }

    #[test]
    fn what_is_gone_is_forgotten_and_the_rest_is_not() {
        let start = Instant::now();
        let mut lately = learned(&[("a", 1), ("b", 2)], start);
        lately.forget(|_, answer| *answer == 1);
        assert!(lately.recall("a", start).is_err());
        assert_eq!(lately.recall("b", start).ok(), Some(2));
    }

    #[test]
    fn no_more_is_remembered_than_the_bound() {
        let (mut lately, start) = (Lately::default(), Instant::now());
        for number in 0..MOST + 10 {
            let asked = lately.recall(&number, start).expect_err("unknown");
            lately.learn(number, number, asked);
        }
        assert_eq!(lately.answers.len(), MOST);
        // Room is made when their moment is over.
        let later = start + MOMENT;
        let asked = lately.recall(&(MOST * 2), later).expect_err("unknown");
        lately.learn(MOST * 2, 0, asked);
        assert_eq!(lately.answers.len(), 1);
    }
}
