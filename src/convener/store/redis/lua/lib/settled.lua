-- Nothing is unanswered, or everything is taken in and the open turn waits for a person; and no stop waits to be
-- finished (core.conversation.is_settled, _may_leave). Arguments as the head has them.
local function may_leave(status, position, done, cursor, asks)
  return status == 'running' and (position == done or (tonumber(asks or 0) > 0 and position == cursor))
end
-- The status of a conversation that nobody owns any more, or not yet (core.conversation._at_rest).
local function at_rest(asks) return tonumber(asks or 0) > 0 and 'waiting' or 'hibernated' end
