//! Which topics a pattern means. Pure.

use geminga_proto::{names::TopicName, reason::Reason};
use regex::{Regex, RegexBuilder};

use crate::error::Error;

/// Compiled size of a pattern, bytes.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// Which topics are meant.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// Dead-letter topics, whose names have a `~`, are meant only by a pattern that says so.
    tilde: bool,
    prefix: String,
}

impl Pattern {
    pub(super) fn new(text: &str) -> Result<Self, Error> {
        let whole = format!("^(?:{text})$");
        let regex = RegexBuilder::new(&whole).size_limit(PATTERN_BYTES_MAX).build();
        let regex = regex.map_err(|error| {
            Error::refused(Reason::InvalidRequest, format!("{text:?} is no pattern: {error}"))
        })?;
        Ok(Self { regex, tilde: text.contains('~'), prefix: literal_prefix(text) })
    }

    pub(super) fn matches(&self, name: &TopicName) -> bool {
        let topic = name.topic();
        self.regex.is_match(topic) && (self.tilde || !topic.contains('~'))
    }

    /// Every name that matches begins with it.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }
}

/// The literal text that everything that matches begins with, as far as it is plain to see; of a valid pattern.
fn literal_prefix(text: &str) -> String {
    let mut prefix = String::new();
    if text.contains('|') {
        return prefix;
    }
    let mut rest = text.chars().peekable();
    while let Some(char) = rest.next() {
        let literal = match char {
            '\\' => rest.next().filter(char::is_ascii_punctuation),
            '^' if prefix.is_empty() => continue,
            '.' | '+' | '*' | '?' | '(' | ')' | '[' | ']' | '{' | '}' | '^' | '$' | '#' => None,
            _ if char.is_whitespace() => None,
            _ => Some(char),
        };
        // One that may be absent is not of the prefix; one that may be repeated is, once.
        let optional = matches!(rest.peek(), Some('*' | '?' | '{'));
        match literal {
            Some(literal) if !optional => prefix.push(literal),
            _ => break,
        }
        if rest.peek() == Some(&'+') {
            break;
        }
    }
    prefix
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::topic_name;

    #[test]
    fn a_pattern_is_of_the_whole_name_and_leaves_dead_letters_alone() {
        let matches = |pattern: &str, topic: &str| {
            let name = topic_name(topic).expect("a name");
            Pattern::new(pattern).expect("a pattern").matches(&name)
        };
        assert!(matches("orders-.*", "orders-eu") && matches("a|b", "b"));
        assert!(!matches("orders", "orders-eu") && !matches("a|b", "ab"));
        assert!(!matches(".*", "orders~billing~dlq") && matches(".*~dlq", "orders~billing~dlq"));
        for bad in ["(", "[a", &"a{1000}".repeat(50)] {
            let error = Pattern::new(bad).expect_err("no pattern");
            assert_eq!(error.reason(), Some(Reason::InvalidRequest), "{bad:?}");
        }
    }

    #[test]
    fn the_prefix_is_the_text_before_anything_that_is_not_plain() {
        for (pattern, prefix) in [
            ("orders-.*", "orders-"),
            ("orders", "orders"),
            (r"eu\.orders\.\d+", "eu.orders."),
            ("^eu-[ab]", "eu-"),
            ("ab*c", "a"),
            ("ab?", "a"),
            ("ab{0,3}", "a"),
            ("ab+c", "ab"),
            ("a|b", ""),
            ("(a|b)c", ""),
            ("(?i)a", ""),
            (".*", ""),
            ("", ""),
        ] {
            assert_eq!(Pattern::new(pattern).expect("a pattern").prefix(), prefix, "{pattern:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_matches_begins_with_the_prefix(
            pattern in r"[ab.^$*+?|\\(){},:iP1x#\[\]~-]{0,10}",
            names in prop::collection::vec("[abi1x.~-]{1,6}", 1..20),
        ) {
            let Ok(pattern) = Pattern::new(&pattern) else { return Ok(()) };
            for name in names {
                let Ok(name) = topic_name(&name) else { continue };
                prop_assert!(!pattern.matches(&name) || name.topic().starts_with(pattern.prefix()), "{name}");
            }
        }
    }
}
