//! Who is asking: a bearer token turned into a caller, or nobody asked for one.

/// How callers are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// By JWT bearer tokens.
    #[default]
    Jwt,
    /// Not at all: one tenant, everything allowed; only on loopback.
    None,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// `lfs:write`: open, sign, complete, abort.
    Write,
    /// `lfs:read`: read, list, resolve.
    Read,
    /// `lfs:admin`: broker-wide.
    Admin,
}

/// Somebody who was let in.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The tenant that everything they open belongs to.
    pub tenant: String,
    /// The token's `sub`.
    pub subject: String,
    /// What they may do.
    pub scopes: Vec<Scope>,
    /// Topics they may use; a trailing `*` is a wildcard.
    pub topics: Vec<String>,
}

impl Caller {
    /// The caller of a broker without tokens.
    pub fn anyone() -> Self {
        Self {
            tenant: "default".to_owned(),
            subject: "anonymous".to_owned(),
            scopes: vec![Scope::Write, Scope::Read, Scope::Admin],
            topics: vec!["*".to_owned()],
        }
    }

    /// Whether they have a scope.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether they may act broker-wide.
    pub fn is_admin(&self) -> bool {
        self.has(Scope::Admin)
    }

    /// Whether they may use a topic.
    pub fn may_use(&self, topic: &str) -> bool {
        self.topics.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(prefix) => topic.starts_with(prefix),
            None => allowed == topic,
        })
    }

    /// Their topics as exact names and prefixes.
    pub fn topic_filter(&self) -> (Vec<String>, Vec<String>) {
        let (prefixes, names): (Vec<&String>, Vec<&String>) = self.topics.iter().partition(|topic| topic.ends_with('*'));
        (names.into_iter().cloned().collect(), prefixes.into_iter().map(|topic| topic.trim_end_matches('*').to_owned()).collect())
    }
}
