//! Values with units, as people write them. Pure.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use jiff::SignedDuration;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// A length of time: text with a unit (`500ms`, `1s`, `2min`, `1h 30m`) or a number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// An amount of bytes: a whole number, or text with a unit (`64MiB`, `1GB`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// A TCP port, as a number or as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port(pub u16);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpanVisitor)
    }
}

struct SpanVisitor;

impl Visitor<'_> for SpanVisitor {
    type Value = Span;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as `500ms`, `1s` or `2min`, or a number of seconds")
    }

    fn visit_u64<E: Error>(self, seconds: u64) -> Result<Span, E> {
        Ok(Span(Duration::from_secs(seconds)))
    }

    fn visit_f64<E: Error>(self, seconds: f64) -> Result<Span, E> {
        Duration::try_from_secs_f64(seconds)
            .map(Span)
            .map_err(|_| E::invalid_value(Unexpected::Float(seconds), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Span, E> {
        let invalid = || E::invalid_value(Unexpected::Str(text), &self);
        if let Ok(seconds) = text.trim().parse::<f64>() {
            return Duration::try_from_secs_f64(seconds).map(Span).map_err(|_| invalid());
        }
        let span = text.parse::<SignedDuration>().map_err(|_| invalid())?;
        Duration::try_from(span).map(Span).map_err(|_| invalid())
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BytesVisitor)
    }
}

struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an amount of bytes such as `64MiB`, or a whole number")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<Bytes, E> {
        Ok(Bytes(bytes))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Bytes, E> {
        let size = text.trim().parse::<ByteSize>();
        size.map(|size| Bytes(size.as_u64())).map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PortVisitor)
    }
}

struct PortVisitor;

impl Visitor<'_> for PortVisitor {
    type Value = Port;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Port, E> {
        let port = u16::try_from(number).ok().filter(|port| *port > 0);
        port.map(Port).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Port, E> {
        let port = text.trim().parse().ok().filter(|port| *port > 0);
        port.map(Port).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

impl JsonSchema for Span {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number"], "minimum": 0 })
    }
}

impl JsonSchema for Bytes {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Bytes".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "integer"], "minimum": 0 })
    }
}

impl JsonSchema for Port {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Port".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "integer"], "minimum": 1, "maximum": 65535 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, from_value, json};

    use super::*;

    fn span(value: Value) -> Option<Duration> {
        from_value::<Span>(value).ok().map(|span| span.0)
    }

    #[test]
    fn durations_are_text_with_a_unit_or_seconds() {
        assert_eq!(span(json!("1s")), Some(Duration::from_secs(1)));
        assert_eq!(span(json!("500ms")), Some(Duration::from_millis(500)));
        assert_eq!(span(json!("2min")), Some(Duration::from_mins(2)));
        assert_eq!(span(json!("1h 30m")), Some(Duration::from_mins(90)));
        assert_eq!(span(json!(10)), Some(Duration::from_secs(10)));
        assert_eq!(span(json!(0.25)), Some(Duration::from_millis(250)));
        assert_eq!(span(json!("0.25")), Some(Duration::from_millis(250)));
        for wrong in
            [json!("soon"), json!("-1s"), json!(-1), json!("-1"), json!("NaN"), json!([1]), json!(true)]
        {
            assert_eq!(span(wrong.clone()), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_text_with_a_unit_or_bytes() {
        let bytes = |value| from_value::<Bytes>(value).ok().map(|bytes| bytes.0);
        assert_eq!(bytes(json!("64MiB")), Some(64 << 20));
        assert_eq!(bytes(json!("1 GB")), Some(1_000_000_000));
        assert_eq!(bytes(json!("1024")), Some(1024));
        assert_eq!(bytes(json!(1024)), Some(1024));
        for wrong in [json!("much"), json!(-1), json!(1.5), json!(null)] {
            assert_eq!(bytes(wrong.clone()), None, "{wrong}");
        }
    }

    #[test]
    fn ports_are_numbers_or_text_in_range() {
        let port = |value| from_value::<Port>(value).ok().map(|port| port.0);
        assert_eq!(port(json!(5432)), Some(5432));
        assert_eq!(port(json!("5432")), Some(5432));
        for wrong in [json!("x"), json!(0), json!("0"), json!(65536), json!("-1"), json!("")] {
            assert_eq!(port(wrong.clone()), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_them_panic(text in ".{0,20}") {
            let value = Value::String(text);
            let _ = from_value::<Span>(value.clone());
            let _ = from_value::<Bytes>(value.clone());
            let _ = from_value::<Port>(value);
        }
    }
}
