//! What a person types: one thin file per command.

mod agent_client;
mod http_response;
