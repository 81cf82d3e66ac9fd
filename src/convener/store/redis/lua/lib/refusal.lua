-- How an entry for the inbox of a conversation that is not `running` is refused (core.conversation.refusal).
local function refusal(status)
  return status == 'failed' and 'FAILED' or status == 'held' and 'HELD' or 'CLOSED'
end
