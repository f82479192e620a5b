//! What is taken out of objects and logs before they leave the machine. Pure.

use serde_json::Value;

/// In place of what was taken out.
const GONE: &str = "(left out)";
/// Parts of names of variables whose plain values are not shown.
const SECRET_WORDS: [&str; 6] =
    ["PASSWORD", "SECRET", "TOKEN", "CREDENTIAL", "ACCESS_KEY", "API_KEY"];

/// Without managed fields and copies of itself, without plain values of variables that sound secret, without users and
/// passwords in addresses. References to Secrets stay references.
pub(super) fn object(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    walk(value);
}

fn walk(value: &mut Value) {
    match value {
        Value::String(text) if text.contains("://") => *text = addresses(text),
        Value::Array(items) => items.iter_mut().for_each(walk),
        Value::Object(fields) => {
            let name = fields.get("name").and_then(Value::as_str).unwrap_or_default();
            let secret = sounds_secret(name);
            for (key, field) in fields {
                if key == "value" && secret && field.is_string() {
                    *field = GONE.into();
                } else {
                    walk(field);
                }
            }
        }
        _ => {}
    }
}

/// A path to a secret is none.
fn sounds_secret(name: &str) -> bool {
    let name = name.to_uppercase();
    SECRET_WORDS.iter().any(|word| name.contains(word)) && !name.ends_with("_FILE")
}

/// `http://user:password@host` becomes `http://(left out)@host`.
pub(super) fn addresses(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        shown.push_str(before);
        let end = after.find(|c: char| c == '/' || c == ',' || c == '"' || c.is_whitespace());
        let authority = &after[..end.unwrap_or(after.len())];
        rest = match authority.rfind('@') {
            Some(at) => {
                shown.push_str(GONE);
                &after[at..]
            }
            None => after,
        };
    }
    shown + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_in_plain_sight_are_taken_out_and_references_stay() {
        let reference = json!({"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "k"}}});
        let mut pod = json!({
            "metadata": {"name": "p", "managedFields": [1], "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": "{}", "kept": "yes",
            }},
            "spec": {"containers": [{"env": [
                {"name": "ETCD_PASSWORD", "value": "hunter2"},
                {"name": "GEMINGA_METADATA_PASSWORD_FILE", "value": "/etc/geminga/password"},
                {"name": "GEMINGA_METADATA_ENDPOINTS", "value": "http://u:p@a:1,http://b:2"},
                reference,
            ]}]},
        });
        object(&mut pod);
        assert_eq!(pod["metadata"], json!({"name": "p", "annotations": {"kept": "yes"}}));
        let env = &pod["spec"]["containers"][0]["env"];
        assert_eq!(env[0]["value"], GONE);
        assert_eq!(env[1]["value"], "/etc/geminga/password");
        assert_eq!(env[2]["value"], "http://(left out)@a:1,http://b:2");
        assert_eq!(env[3], reference);
    }

    #[test]
    fn only_users_and_passwords_leave_an_address() {
        for (text, shown) in [
            ("plain", "plain"),
            ("see http://a/b@c and", "see http://a/b@c and"),
            ("x=s3://u@h, y=http://k:v@h", "x=s3://(left out)@h, y=http://(left out)@h"),
            ("://", "://"),
            ("a://\u{e4}:\u{f6}@h", "a://(left out)@h"),
        ] {
            assert_eq!(addresses(text), shown);
        }
    }
}
