//! Toxiproxy: every connection between the parts goes through it, and it is told over HTTP what to do to them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Failure;
use crate::plan::{Link, Toxic};

/// The proxies, and the port that each listens on.
pub(crate) struct Proxies {
    api: String,
    http: reqwest::Client,
    ports: BTreeMap<Link, u16>,
}

impl Proxies {
    /// Speaks to the server at this port of its API.
    pub(crate) fn at(port: u16, http: reqwest::Client) -> Self {
        Self { api: format!("http://127.0.0.1:{port}"), http, ports: BTreeMap::new() }
    }

    /// Makes a proxy from `listen` to `upstream`.
    pub(crate) async fn make(&mut self, link: Link, listen: u16, upstream: u16) -> Result<(), Failure> {
        let body = json!({
            "name": link.to_string(), "enabled": true,
            "listen": format!("127.0.0.1:{listen}"), "upstream": format!("127.0.0.1:{upstream}"),
        });
        self.ports.insert(link, listen);
        self.call("POST", "/proxies", Some(&body)).await
    }

    /// `host:port` of a link's near end.
    pub(crate) fn address(&self, link: Link) -> String {
        format!("127.0.0.1:{}", self.ports[&link])
    }

    /// Begins to spoil a link.
    pub(crate) async fn poison(&self, link: Link, toxic: Toxic) -> Result<(), Failure> {
        let (kind, stream, attributes) = match toxic {
            // Without a time-out of its own it swallows everything until it is removed, and then cuts the connection.
            Toxic::LostRequests => ("timeout", "upstream", json!({"timeout": 0})),
            Toxic::LostAnswers => ("timeout", "downstream", json!({"timeout": 0})),
            Toxic::CutRequests(bytes) => ("limit_data", "upstream", json!({"bytes": bytes})),
            Toxic::CutAnswers(bytes) => ("limit_data", "downstream", json!({"bytes": bytes})),
            Toxic::Reset => ("reset_peer", "downstream", json!({"timeout": 0})),
            Toxic::Slow(ms) => ("latency", "downstream", json!({"latency": ms, "jitter": ms / 2})),
            Toxic::Refused => return self.enable(link, false).await,
        };
        let body = json!({"name": "toxic", "type": kind, "stream": stream, "toxicity": 1.0, "attributes": attributes});
        self.call("POST", &format!("/proxies/{link}/toxics"), Some(&body)).await
    }

    /// Lets a link work again.
    pub(crate) async fn heal(&self, link: Link, toxic: Toxic) -> Result<(), Failure> {
        match toxic {
            Toxic::Refused => self.enable(link, true).await,
            _ => self.call("DELETE", &format!("/proxies/{link}/toxics/toxic"), None).await,
        }
    }

    async fn enable(&self, link: Link, enabled: bool) -> Result<(), Failure> {
        self.call("POST", &format!("/proxies/{link}"), Some(&json!({"enabled": enabled}))).await
    }

    async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let method: reqwest::Method = method.parse().map_err(|_| Failure(format!("{method} is no method")))?;
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.api)).timeout(Duration::from_secs(20));
        if let Some(body) = body {
            request = request.json(body);
        }
        let failed = |why: String| Failure(format!("toxiproxy: {method} {path}: {why}"));
        let answer = request.send().await.map_err(|error| failed(error.to_string()))?;
        let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
        if status.is_success() { Ok(()) } else { Err(failed(format!("{status} {text}"))) }
    }
}
