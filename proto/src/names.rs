//! Names, parsed once into types that cannot hold one that escapes (security S3).

use std::fmt;

/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 200;

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty.
    #[error("{kind} name is empty")]
    Empty { kind: &'static str },
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("{kind} name has {bytes} bytes, at most {NAME_BYTES_MAX} are allowed")]
    TooLong { kind: &'static str, bytes: usize },
    /// A character outside `[A-Za-z0-9._~-]`.
    #[error(
        "{kind} name has the forbidden character {character:?}; allowed are A-Z a-z 0-9 . _ ~ -"
    )]
    Character { kind: &'static str, character: char },
    /// `.` or `..`.
    #[error("{kind} name must not be '.' or '..'")]
    Dots { kind: &'static str },
    /// Not the expected number of parts between slashes.
    #[error("{got:?} is not of the form {form}")]
    Form { got: String, form: &'static str },
}

fn check(kind: &'static str, name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty { kind });
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong { kind, bytes: name.len() });
    }
    if let Some(character) =
        name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '~' | '-')))
    {
        return Err(NameError::Character { kind, character });
    }
    if name == "." || name == ".." {
        return Err(NameError::Dots { kind });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks and wraps one name.
            ///
            /// # Errors
            /// [`NameError`] for a name outside `[A-Za-z0-9._~-]{1,200}`, or `.` or `..`.
            pub fn parse(name: &str) -> Result<Self, NameError> {
                check($kind, name)?;
                Ok(Self(name.into()))
            }

            /// The checked text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A tenant.
    TenantName, "tenant"
);
name!(
    /// A subscription, within its topic.
    SubscriptionName, "subscription"
);
name!(
    /// A producer a user named.
    ProducerName, "producer"
);
name!(
    /// A consumer within its subscription.
    ConsumerName, "consumer"
);

/// `tenant/namespace`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceName {
    tenant: TenantName,
    namespace: Box<str>,
}

impl NamespaceName {
    /// Parses `tenant/namespace`.
    ///
    /// # Errors
    /// [`NameError`] when a part is not a name or the number of parts differs.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let parts: Vec<&str> = text.split('/').collect();
        let [tenant, namespace] = parts[..] else {
            return Err(NameError::Form { got: printable(text), form: "tenant/namespace" });
        };
        check("namespace", namespace)?;
        Ok(Self { tenant: TenantName::parse(tenant)?, namespace: namespace.into() })
    }

    /// The tenant.
    #[must_use]
    pub fn tenant(&self) -> &TenantName {
        &self.tenant
    }

    /// The last part.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl fmt::Display for NamespaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.namespace)
    }
}

/// `tenant/namespace/topic`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicName {
    namespace: NamespaceName,
    topic: Box<str>,
}

impl TopicName {
    /// Parses `tenant/namespace/topic`.
    ///
    /// # Errors
    /// [`NameError`] when a part is not a name or the number of parts differs.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let form = || NameError::Form { got: printable(text), form: "tenant/namespace/topic" };
        let (namespace, topic) = text.rsplit_once('/').ok_or_else(form)?;
        if namespace.split('/').count() != 2 {
            return Err(form());
        }
        check("topic", topic)?;
        Ok(Self { namespace: NamespaceName::parse(namespace)?, topic: topic.into() })
    }

    /// `tenant/namespace`.
    #[must_use]
    pub fn namespace(&self) -> &NamespaceName {
        &self.namespace
    }

    /// The last part.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.topic)
    }
}

/// At most 80 characters of text that a stranger sent, fit for an error message.
fn printable(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_escape_is_refused() {
        for bad in ["", ".", "..", "a/b", "a\0", "a\n", "ä", "a b", "%2e", &"x".repeat(201)] {
            assert!(TenantName::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "A-z.0_~", "...", &"x".repeat(200)] {
            assert!(TenantName::parse(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_topic_has_exactly_three_parts() {
        assert_eq!(TopicName::parse("a/b/c").expect("valid").to_string(), "a/b/c");
        for bad in ["a", "a/b", "a/b/c/d", "/b/c", "a//c", "a/b/", "../b/c", "a/b/.."] {
            assert!(TopicName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
